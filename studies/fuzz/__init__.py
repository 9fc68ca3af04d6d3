"""Random small worlds: what the closed forms say of them, and whether it is true."""
