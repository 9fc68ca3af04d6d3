"""What the constants of span_then_round and span_then_match rest on."""
