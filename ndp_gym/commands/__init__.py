"""The sub-commands of ``ndp-gym``, one module each.

A module ``ndp_gym.commands.<name>`` defines ``add_parser(subparsers)``: it adds the parser called
``<name>`` and sets its ``func``, which takes the parsed arguments and returns the exit code. What
is slow to import is imported inside ``func``.
"""
