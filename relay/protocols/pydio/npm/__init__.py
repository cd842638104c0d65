"""The npm server type of Pydio: the same registration over Socket.IO 2.x to 4.x."""
