"""The artifact: how parts are encoded into one file and decoded from it.

Writing: a specification (``specs``) and float values give a part (``encode``, ``xor``), ``write_artifact`` the file.
Reading: ``open_artifact``, then ``Artifact.delta`` for one parameter at a time.
"""
