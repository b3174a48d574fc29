"""MEASUREMENTS. Every number that the project states comes from a script here."""
