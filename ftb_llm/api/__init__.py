"""The control plane: reports on the live run and reconfigures it, over HTTP. Imports nothing by itself, so that the client stays light."""
