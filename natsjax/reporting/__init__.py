"""What a report is made of: what evaluation stores, its table, its picture and its page; this package only draws.

``natsjax.evaluate`` measures and ``natsjax.report`` and ``natsjax.compare`` are for people. Everything handed over is
plain dicts and lists (``results`` has their fields).
"""
