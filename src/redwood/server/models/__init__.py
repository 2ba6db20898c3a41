"""Several models behind one address: loaded when asked for, unloaded to make room or when idle.

`pool` is what the routes see in the place of one `Service`; `entry` is one of its models, `keeper`
loads and unloads them, `room` says how much memory that takes, `metrics` joins what each counts.
"""
