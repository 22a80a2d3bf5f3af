"""A launch over several machines: who meets where, what they tell each other, and what it comes to.

Each machine runs the same command. Its supervisor watches its own ranks; node 0 leads, and its verdict is
about all of them.
"""
