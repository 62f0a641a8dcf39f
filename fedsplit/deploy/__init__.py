"""A deployment on real devices: certificates and keys, and what a device needs for an offline install."""
