"""The CPU backend: panels between C++ epilogues."""
