"""Engine.IO 3 and 4: packets, polling, websocket and the way from one to the other."""
