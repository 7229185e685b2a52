"""Mathematics that the formats share: truncated factorisations, HOOI, whitening."""
