"""From parent to child: score and cost every variant of every block, choose one each, prune; start in library.py."""
