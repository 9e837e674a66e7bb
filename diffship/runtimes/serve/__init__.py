"""The cloud server: requests over HTTP share model calls, step by step.

`forms` and `order` turn a body into work, `jobs` is one request's life, `admission` says who is let in, `batcher` who
shares the next call, `worker` is the thread that makes the calls of one model, `service` joins them. None of these
knows HTTP; `app` does, and `server` is the one file that knows which process runs it. `fastapi` and `uvicorn` are the
extra `serve`.
"""
