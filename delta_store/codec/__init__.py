"""The artifact: how parts are encoded into one file and decoded from it."""
