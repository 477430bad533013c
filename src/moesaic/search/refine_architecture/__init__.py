"""The stage that measures whole assemblies and refines the search's choice; the method is in interactions.py."""
