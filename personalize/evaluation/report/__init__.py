"""Scores as a page to read: verdict, tables, figures."""
