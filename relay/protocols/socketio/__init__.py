"""AcceleratXR's push notifications: Socket.IO 2 to 4 clients in one namespace, by JWT."""
