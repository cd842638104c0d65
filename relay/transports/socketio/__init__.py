"""Socket.IO over Engine.IO: packets of protocols 4 (clients 2.x) and 5 (3.x and 4.x)."""
