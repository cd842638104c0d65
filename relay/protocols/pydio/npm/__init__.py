"""The npm kind: the same registration over Socket.IO, for clients 2.x to 4.x."""
