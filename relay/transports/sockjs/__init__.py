"""SockJS: its sessions, its transports, and the paths a door mounts."""
