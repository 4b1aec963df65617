"""What a stored sweep says: exponents, crossings, the largest image; its page and pictures."""
