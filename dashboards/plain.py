"""Elements that nothing is connected to, sent as one component: Dash's work grows with the number of components."""

from __future__ import annotations

from typing import Any

from dash.development.base_component import Component


class Plain(Component):
    """A tree of elements that the browser makes by itself, see ``autorank_parts`` in ``assets/autorank.js``.

    Parameters
    ----------
    tree : object
        A text, a list of trees, or ``{"tag", "attributes", "children"}``.
    """

    _namespace, _type = "autorank_parts", "Plain"
    _base_nodes, _children_props, _valid_wildcard_attributes = ["children"], [], []
    _prop_names, available_properties, available_wildcard_properties = ["tree"], ["tree"], []

    def __init__(self, tree: Any) -> None:
        super().__init__(tree=tree)


def plain(part: Any) -> Plain:
    """Return elements of `dash.html` as one component; no callback can name them or what they hold."""
    return Plain(_tree(part))


def _tree(part: Any) -> Any:
    if isinstance(part, list | tuple):
        return [_tree(one) for one in part]
    if not isinstance(part, Component):
        return "" if part is None else str(part)
    made = part.to_plotly_json()
    if made["namespace"] != "dash_html_components":
        raise TypeError(f"{made['type']} is more than an element")
    attributes = {name: value for name, value in made["props"].items() if name != "children" and value is not None}
    return {"tag": made["type"].lower(), "attributes": attributes, "children": _tree(made["props"].get("children"))}
