"""What blocks and models cost in bytes and milliseconds, measured or modelled; start in block_costs.py."""
