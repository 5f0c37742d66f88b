"""The endpoints, one router per module; `app.ROUTERS` lists them."""
