"""Requests to other machines: the HTTP client, the wire format, the chat client and the worker."""
