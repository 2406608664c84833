"""`mome serve`: an HTTP server that segments uploaded scans. `docs/server.md` describes its routes.

The process of the server receives uploads, keeps the queue in SQLite and sends results; it imports no torch. One child
process, the worker, holds the model. A crash of the worker fails one job. Importing this package imports nothing.
"""
