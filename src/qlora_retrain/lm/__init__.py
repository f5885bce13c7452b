"""What a language model makes of rows: chats to tokens, loading, forward passes, generation.

Hashed: a step's code identity covers what it imports of this package.
"""
