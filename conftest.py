"""What the whole suite needs and pytest allows only here. No import: it is for everybody's installation."""

pytest_plugins = ["pytester"]
