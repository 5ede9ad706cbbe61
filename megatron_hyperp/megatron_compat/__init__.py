"""Every private or version-dependent name of Megatron-Core and torch that this trainer uses, and no other code.

A module per concern, with the difference between versions inside it. ``contracts.py`` lists the names; each has a test.
"""
