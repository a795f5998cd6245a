"""Moves pages between cache leaves and the host pool: page ops, pool ops and `BlockTransfer`."""
