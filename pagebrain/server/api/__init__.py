"""The HTTP API: routes, types of requests and answers, tokenizing, server-sent events, metrics and the request log."""
