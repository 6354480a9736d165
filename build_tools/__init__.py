"""What setup.py builds with: the compilers of this machine, and the graph that ninja runs."""
