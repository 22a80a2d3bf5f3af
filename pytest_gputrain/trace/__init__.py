"""What a rank records while it trains. Imports nothing of the rest of the package but plain names."""
