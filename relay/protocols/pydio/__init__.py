"""The Pydio protocol: PHP uses the private channel, and browsers the public one."""
