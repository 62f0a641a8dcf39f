"""Where rounds run: in this process, in a Flower simulation, or on devices.

Only `flower_ray.py`, `superlink.py`, `client_app.py` and `server_app.py` know Flower and Ray.
"""
