"""Configuration files, variables and flags of Centrifugo v1."""
