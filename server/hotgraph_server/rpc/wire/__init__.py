"""Messages to our types and back: the only place that knows both. It checks nothing; `rpc/validate.py` did.

A file for each kind of message: `generation`, `graphs`, `model`, `status`, and `common` for times.
"""
