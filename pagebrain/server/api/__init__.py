"""The HTTP API: routes, what requests and answers look like, prompts, streams of events, metrics and the request log."""
