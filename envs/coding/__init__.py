"""Coding tasks in a sandbox: an agent repairs or writes code, hidden tests grade it."""
