"""A client of python-socketio 4 or 5 that reports what happens, one JSON list per line.

python -P socketio_python.py URL TRANSPORT TOKEN
"""

import contextlib
import json
import sys
import time
from typing import Any

import socketio

URL, TRANSPORT, TOKEN = sys.argv[1:]
NAMESPACE = "/axr"
OLD = not hasattr(socketio, "SimpleClient")


def say(*what: Any) -> None:
    """Report one thing that has happened."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


client = socketio.Client(reconnection_delay=0.1, reconnection_delay_max=0.2)
client.on("connect", lambda: say("connect"), namespace=NAMESPACE)
client.on("disconnect", lambda *_: say("disconnect"), namespace=NAMESPACE)
client.on("connect_error", lambda *_: say("connect_error"), namespace=NAMESPACE)
client.on("text", lambda *args: say("text", *args), namespace=NAMESPACE)
client.on("nothing", lambda *args: say("nothing", *args), namespace=NAMESPACE)
options: dict[str, Any] = {"transports": [TRANSPORT], "namespaces": [NAMESPACE]}
if OLD:
    URL += f"?jwt_token={TOKEN}"
else:
    options["auth"] = {"token": TOKEN}
with contextlib.suppress(socketio.exceptions.ConnectionError):
    client.connect(URL, socketio_path="notifications", **options)
# `wait` of version 4 also returns after a quick reconnect.
idle = 0
while idle < 5:
    idle = 0 if client.eio.state == "connected" or client._reconnect_task else idle + 1
    time.sleep(0.2)
say("ended")
