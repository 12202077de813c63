"""From authenticated sessions to backends: routes, messages, delivery, relays."""
