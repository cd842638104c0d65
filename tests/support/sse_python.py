"""Clients of server-sent events in Python: sseclient, or requests alone. Print events as JSON.

python sse_python.py sseclient|requests URL COUNT
"""

import json
import sys

import requests
import sseclient

library, url, count = sys.argv[1:]
found = []
if library == "sseclient":
    for message in sseclient.SSEClient(url):
        found.append([message.event, json.loads(message.data)])
        if len(found) == int(count):
            break
else:
    with requests.get(url, stream=True, timeout=10) as answer:
        kind = "message"
        for line in answer.iter_lines(decode_unicode=True, chunk_size=1):
            name, _, value = line.partition(": ")
            if name == "event":
                kind = value
            elif name == "data":
                found.append([kind, json.loads(value)])
                kind = "message"
            if len(found) == int(count):
                break
sys.stdout.write(json.dumps(found))
