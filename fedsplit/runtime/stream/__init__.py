"""Packets between a device and the server's body, over gRPC. It knows bytes: neither torch nor Flower.

`packet.py` the format; `ticket.py` who may open a session; `session.py` its states; `server.py` and `client.py` the
two ends. `docs/link.md` specifies all of it.
"""
