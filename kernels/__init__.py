"""The operations that apply deltas: ``reference`` is their meaning, ``dispatch`` chooses who runs them."""
