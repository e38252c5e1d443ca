"""Stages: each reads files, writes files, and knows no other stage."""
