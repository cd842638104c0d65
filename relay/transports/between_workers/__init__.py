"""Connections and requests that one worker passes to another."""
