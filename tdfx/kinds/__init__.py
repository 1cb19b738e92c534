"""What can be a site: the layer kinds, built in and registered by users, and the functional calls."""
