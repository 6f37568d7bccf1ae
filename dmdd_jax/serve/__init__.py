"""The HTTP server and its page: app, batching of requests, models."""
