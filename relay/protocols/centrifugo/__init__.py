"""The Centrifugo v1 door; so far its HTTP API."""
