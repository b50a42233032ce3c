"""The paper: pure functions of arrays, and the network. Imports no other part of the package."""
