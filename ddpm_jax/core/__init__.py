"""The paper: pure functions of arrays, and the network. Imports nothing else of this package."""
