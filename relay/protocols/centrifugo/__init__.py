"""The Centrifugo protocol, version 1: clients, HTTP API and administrators."""
